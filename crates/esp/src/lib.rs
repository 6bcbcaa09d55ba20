//! ESP tunnel mode: seal, open, replay window, SA table.
