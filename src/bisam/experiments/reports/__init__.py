"""Reports: tables, pages and figures, from run folders alone."""
