"""The report in one HTML file: the measurements and the data of the page, whose source is in `web/`."""
