"""From slide to tensor: PANDA's conventions, slide reading, patches, datasets. Never imports models, training or metrics."""
