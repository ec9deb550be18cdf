"""Routers other than Mixtral's: those of the literature, pictures of what they do, and the contract for any router."""
