"""Families of problems: what is asked, and the programs that answer it."""
