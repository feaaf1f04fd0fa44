"""The sink prefix: tokens whose keys and values a model carries, so that their outliers meet no integer."""
