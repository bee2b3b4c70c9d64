"""Labels drawn by hand: one pair's objects, the folder they are kept in, and COCO files of them."""
