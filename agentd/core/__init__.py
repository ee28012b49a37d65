"""Values that several layers share: ids, errors, units, places, wire types. No I/O beyond reading the environment."""
