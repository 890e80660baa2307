"""``sasa explore``: a page for pointing at a pixel and seeing what the network sees. Needs ``explore``."""
