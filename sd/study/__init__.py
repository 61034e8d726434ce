"""The studies behind RESULTS.md: how their runs are made and kept, what their tables and figures say."""
