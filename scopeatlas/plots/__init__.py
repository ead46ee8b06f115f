"""Pictures of results, one module for each kind; every one gives a figure that saves to PNG and shows in a notebook."""
