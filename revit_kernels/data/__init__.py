"""Images: finding and decoding files, and gathering photographs and weights to try the library on."""
