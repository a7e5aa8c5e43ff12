"""Code that the recipes share: stages, arguments, data, judges, the report."""
