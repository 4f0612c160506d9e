"""The default domain: stories from a grammar, a judge of them, pairs made with it, the shipped model, and the demo."""
