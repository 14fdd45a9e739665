"""Lists, audio reading, training crops and augmentation."""
