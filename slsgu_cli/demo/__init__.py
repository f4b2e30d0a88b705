"""The embedded CLIP and labelled icons that `slsgu demo` runs on."""
