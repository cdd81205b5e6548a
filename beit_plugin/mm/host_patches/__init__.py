"""Every place where something of a host is replaced."""
