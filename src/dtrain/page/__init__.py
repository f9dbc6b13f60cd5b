"""Pages of one HTML file each, which need no network: style, charts, and their hover values."""
