"""The defences. Each paper has a module of its own, and none imports another; `masked` holds defences that are broken on purpose."""
