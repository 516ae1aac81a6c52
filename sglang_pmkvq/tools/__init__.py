"""The `pmkvq` command and what it runs beside a server."""
