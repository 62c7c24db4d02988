"""What the report page is made of beside its text: the style sheet and the charts."""
