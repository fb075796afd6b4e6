"""Model: the interface to torch modules. Methods query an oracle; only this package runs or changes a module."""
