"""The report in one HTML file: what it shows is measured here, and how it looks is the page's own, in `web/`."""
