"""`dive-fast experiment`: systems compared on one frozen model, data, seeds and steps, described by a YAML file."""
