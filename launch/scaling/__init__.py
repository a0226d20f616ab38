"""What follows from size: the coordinate check across widths, and the law that a ladder of sizes is fitted by."""
