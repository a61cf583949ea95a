"""Audits of damage, kills and concurrent processes. Each exits with 1 if a promise is broken."""
