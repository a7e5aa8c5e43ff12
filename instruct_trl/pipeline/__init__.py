"""What the recipes share: stages, arguments, loading."""
