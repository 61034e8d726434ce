"""Running: files, processes, pages. Nothing here changes what is computed."""
