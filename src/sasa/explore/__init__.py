"""``sasa explore``: a page on which one points at a pixel and sees what the network sees. Needs ``explore``."""
