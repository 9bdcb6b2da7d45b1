//! What `corral plan` says, against what steps take.

use corral::algorithms::step::{MicroBatch, accumulate_gradients};
use corral::config::sections::Recompute;
use corral::config::shape::Shape;
use corral::config::trainable::{Base, Freeze, Lora, Targets};
use corral::distributed::sharded::Sharded;
use corral::model::memory::{Batch, Memory};
use corral::model::{DropoutPlace, Input, Llama, Trainable};
use kernels::c10d::Group;
use kernels::counting;
use tch::{Device, Kind, Tensor};

fn shape(preset: &str) -> Shape {
    Shape {
        vocab_size: 1024,
        hidden_size: 256,
        intermediate_size: 704,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        max_position_embeddings: 4096,
        ..Shape::preset(preset).unwrap()
    }
}

fn lora(base: Base, dropout: f64) -> Option<Lora> {
    let targets = Targets::AllLinear;
    Some(Lora { rank: 16, alpha: 32.0, dropout, targets, rslora: false, modules_to_save: Vec::new(), base })
}

/// The most bytes that the tensors of a step take besides the parameters, and what the plan says.
fn step(shape: &Shape, trainable: &Trainable, compute: Kind, batch: Batch) -> (i64, i64) {
    let plans = trainable.plans(shape).unwrap();
    let memory = Memory::new(shape, &plans, compute, 1, Device::Cpu).unwrap();
    let planned = memory.step(&batch).total() - memory.resident().total();
    let mut params = Sharded::new(plans, Group::solo(), Group::solo(), compute, Device::Cpu);
    params.fill(|_, _, values| Ok(drop(values.shallow_clone().uniform_(-0.05, 0.05)))).unwrap();
    params.fill_adapters(|_, _, values| Ok(drop(values.shallow_clone().uniform_(-0.05, 0.05)))).unwrap();
    let mut model = Llama::new(shape.clone(), params);
    let count = batch.rows * batch.length;
    let (_, counted) = counting::tensors(|| {
        let micro_batch = |_| {
            let ids =
                Tensor::randint(shape.vocab_size, [batch.rows, batch.length], (Kind::Int64, Device::Cpu));
            let labels = ids.view([-1]).copy();
            let mut input = Input::new(ids);
            input.dropout = Some(DropoutPlace { seed: 1, step: 1, first_row: 0 });
            if batch.packed {
                let at = Tensor::arange(batch.length, (Kind::Int64, Device::Cpu)).repeat([batch.rows]);
                input.start = Some(at.zeros_like());
                input.positions = Some(at);
            }
            MicroBatch { input, labels }
        };
        let micro_batches: Vec<_> = (0..batch.micro_batches).map(micro_batch).collect();
        accumulate_gradients(&mut model, &micro_batches, count as f64, batch.recompute).unwrap()
    })
    .unwrap();
    (counted.peak, planned)
}

#[test]
fn the_walk_takes_what_a_step_takes() {
    let all = || Trainable::default();
    let adapters = |base, dropout| Trainable::new(&Freeze::default(), lora(base, dropout).as_ref());
    let upper = Trainable::new(&Freeze { blocks: 2, embeddings: true, train_only: Vec::new() }, None);
    let llama = shape("llama-15m");
    let tied = Shape { tie_word_embeddings: true, ..llama.clone() };
    let cases = [
        ("llama", &llama, all()),
        ("tied", &tied, all()),
        ("frozen", &llama, upper),
        ("lora", &llama, adapters(Base::None, 0.0)),
        ("lora dropout", &llama, adapters(Base::None, 0.1)),
        ("int8", &llama, adapters(Base::Int8, 0.0)),
        ("nf4", &llama, adapters(Base::Nf4, 0.0)),
        ("qwen3", &Shape { family: corral::config::shape::Family::Qwen3, ..llama.clone() }, all()),
        ("mixtral", &shape("mixtral-8x7b"), all()),
    ];
    for (name, shape, trainable) in &cases {
        for (compute, recompute) in [
            (Kind::Float, Recompute::None),
            (Kind::Float, Recompute::Selective),
            (Kind::Float, Recompute::Full),
            (Kind::BFloat16, Recompute::None),
            (Kind::BFloat16, Recompute::Full),
        ] {
            for (rows, length, micro_batches, packed) in [(4, 256, 1, false), (2, 128, 3, true)] {
                let batch = Batch { rows, length, micro_batches, recompute, packed };
                let (counted, planned) = step(shape, trainable, compute, batch);
                let what = format!("{name} {compute:?} {recompute:?}, {micro_batches} x {rows} x {length}");
                println!("{what}: {counted} bytes, planned {planned}");
                // Products in bfloat16 and the attention have scratch memory that does not grow with the model.
                let scratch = if compute == Kind::Float { 1 << 18 } else { 3 << 19 };
                let tolerance = counted / 100 + scratch;
                assert!((counted - planned).abs() < tolerance, "{what}: {counted} bytes, planned {planned}");
            }
        }
    }
}
