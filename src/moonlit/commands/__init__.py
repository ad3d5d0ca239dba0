"""What ``moonlit`` commands do that is not training; ``cli.py`` calls them."""
