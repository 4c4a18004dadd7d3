"""Abstract suites, one per port; every implementation inherits the suite of its port."""
