"""Reading images and labels, the image processor, views and masks of masked image modelling, files of tokens."""
