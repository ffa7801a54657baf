"""Tasks, command line, worker, pages, exporters. Nobody imports this folder."""
