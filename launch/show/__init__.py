"""Tables for people: status, inspection, plans."""
