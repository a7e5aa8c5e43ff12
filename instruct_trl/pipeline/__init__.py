"""What the recipes share: stages, assets, arguments, loading."""
