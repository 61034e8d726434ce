"""The studies behind RESULTS.md: how their runs are made and kept, their tables and figures."""
