#!/bin/sh
# The recipe resnet50-32 on a machine with one GPU: data, a small text tower, training, test images, and the share of a
# step that waits for data. Writes train/recipes/resnet50-32.json and benchmarks/results/input_pipeline.json.
#
#   sh benchmarks/gpu_encoder.sh ../shared/data/cifar10 runs/gpu_encoder
set -eu
images=$1
folder=$2
mkdir -p "$folder"
python -c "import torch; assert torch.cuda.is_available(), 'there is no GPU'"
for split in train:train test:held-out; do
    test -e "$folder/${split%%:*}.csv" || python -m sigphi data build --images "$images" \
        --image-split "${split%%:*}" --phrasing "${split##*:}" --output "$folder/${split%%:*}.csv"
done
test -e "$folder/base/config.json" || python -m sigphi.train.base_lm --config train/recipes/cifar10_base.yaml \
    --input-csv "$folder/train.csv" --images "$images" --output-dir "$folder/base"
python benchmarks/recipes.py resnet50-32 --images "$images" --text-model "$folder/base" \
    --input-csv "$folder/train.csv" --test-csv "$folder/test.csv" --output-dir "$folder/resnet50-32"
python benchmarks/input_pipeline.py --recipe resnet50-32 --images "$images" --text-model "$folder/base" \
    --input-csv "$folder/train.csv" --workers 0 2 8
