"""From any source of images to batches of tensors: sources, columns, images, mapped and streamed reading, skipped rows."""
