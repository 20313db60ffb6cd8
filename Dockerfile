# Purpose: training and evaluation on NVIDIA GPUs. Written, not built or run yet: no GPU and no registry was at hand.
# Command: docker build -t self1e .
#          docker run --gpus all --shm-size 16g -v $PWD/dataset:/self1e/dataset -v $PWD/data:/self1e/data -v $PWD/runs:/self1e/runs \
#              -v PATH/InternVL3-2B:/models/InternVL3-2B self1e \
#              deepspeed train_hf_ivl_seq.py --config configs/self1e_2b.yaml --version /models/InternVL3-2B --exp_name NAME
# Cost:    an image of about 10 GB. PyTorch's wheels bring CUDA's libraries; the host brings the driver.
FROM python:3.12-slim

# g++ and ninja compile DeepSpeed's and torch.compile's operators on first use.
RUN apt-get update && apt-get install -y --no-install-recommends g++ ninja-build && rm -rf /var/lib/apt/lists/*
WORKDIR /self1e
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
CMD ["self1e", "--help"]
