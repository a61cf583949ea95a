"""Bridges to the tools of others; each imports its tool only when it is imported itself."""
