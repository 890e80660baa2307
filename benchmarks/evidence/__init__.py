"""The value of attention on real images: plans for ``sasa study``, their results, and the page that shows them."""
