"""A package, because other distributions (radgraph among them) install a `tests` of their own, which would be found."""
