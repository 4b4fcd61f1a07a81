"""A Trainer class: `self.optimizer`, `self.loss`, callbacks, an iterator re-made on StopIteration."""
import time
from collections import defaultdict

import torch
from torch import nn
from torch.utils.data.dataloader import DataLoader


class Trainer:
    def __init__(self, config, model, train_dataset):
        self.config = config
        self.model = model
        self.optimizer = None
        self.train_dataset = train_dataset
        self.callbacks = defaultdict(list)
        self.iter_num = 0
        self.iter_time = 0.0
        self.iter_dt = 0.0

    def trigger_callbacks(self, onevent):
        for callback in self.callbacks.get(onevent, []):
            callback(self)

    def run(self):
        model, config = self.model, self.config
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
        train_loader = DataLoader(self.train_dataset, shuffle=True, batch_size=config["batch_size"])
        model.train()
        self.iter_num = 0
        self.iter_time = time.time()
        data_iter = iter(train_loader)
        while True:
            try:
                batch = next(data_iter)
            except StopIteration:
                data_iter = iter(train_loader)
                batch = next(data_iter)
            x, y = batch
            self.loss = nn.functional.mse_loss(model(x), y)
            model.zero_grad(set_to_none=True)
            self.loss.backward()
            self.optimizer.step()

            self.trigger_callbacks('on_batch_end')
            self.iter_num += 1
            tnow = time.time()
            self.iter_dt = tnow - self.iter_time
            self.iter_time = tnow
            if config["max_iters"] is not None and self.iter_num >= config["max_iters"]:
                break


if __name__ == "__main__":
    torch.manual_seed(3)
    data = torch.utils.data.TensorDataset(torch.randn(40, 5), torch.randn(40, 1))
    net = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    trainer = Trainer({"lr": 1e-2, "batch_size": 8, "max_iters": 12}, net, data)
    trainer.run()
    print("final", sum(p.double().sum().item() for p in net.parameters()))
