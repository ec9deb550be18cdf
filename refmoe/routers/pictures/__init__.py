"""Pictures of a routing: how many tokens each expert gets, and which, as text, SVG or PNG."""
