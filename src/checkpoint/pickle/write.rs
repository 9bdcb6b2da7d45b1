//! The pickle of a state dict, written.

use tch::Kind;

/// Writes the pickle of a dictionary of contiguous tensors, each with a storage of its own, named `0`, `1`, ... in their
/// order: protocol 2, as `torch.save` writes it, but without references to what was said before.
pub fn write_state_dict<'a>(
    tensors: impl Iterator<Item = (&'a str, Kind, &'a [i64])>,
) -> Result<Vec<u8>, String> {
    let mut out = vec![0x80, 2, b'}', b'('];
    for (i, (name, kind, shape)) in tensors.enumerate() {
        let storage = match kind {
            Kind::Double => "DoubleStorage",
            Kind::Float => "FloatStorage",
            Kind::Half => "HalfStorage",
            Kind::BFloat16 => "BFloat16Storage",
            other => return Err(format!("`{name}`: cannot write {other:?}")),
        };
        put_text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        put_text(&mut out, "storage");
        out.extend(format!("ctorch\n{storage}\n").bytes());
        put_text(&mut out, &i.to_string());
        put_text(&mut out, "cpu");
        put_integer(&mut out, shape.iter().product());
        out.extend(b"tQ");
        put_integer(&mut out, 0);
        out.push(b'(');
        shape.iter().for_each(|d| put_integer(&mut out, *d));
        out.extend(b"t(");
        (1..=shape.len()).for_each(|d| put_integer(&mut out, shape[d..].iter().product()));
        // Not requiring gradients, no hooks.
        out.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    Ok(out)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.bytes());
}

fn put_integer(out: &mut Vec<u8>, i: i64) {
    match i32::try_from(i) {
        Ok(i) => {
            out.push(b'J');
            out.extend(i.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 8]);
            out.extend(i.to_le_bytes());
        }
    }
}
