"""What is measured of parameters: statistics, differences, digests, and what a single tensor holds."""
