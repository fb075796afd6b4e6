"""Model: the border with torch modules. Methods query an oracle; nothing but this package runs or changes a module."""
