"""vqunet_tf: purify adversarial images with a vector-quantized U-Net before they reach a classifier."""
