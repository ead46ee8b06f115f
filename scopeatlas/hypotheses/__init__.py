"""What a label is and how it is measured: rules as data, the units they are tested on, metrics and intervals."""
