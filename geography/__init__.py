"""Geography without a network: distances, gazetteer, geocells. Needs numpy; shapely and others where the module says so."""
