"""Pages and pictures: a run's data, drawn by matplotlib and filled into jinja2 templates."""
