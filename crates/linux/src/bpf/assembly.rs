//! eBPF's assembly, as LLVM and the kernel's verifier write it, made into instructions (RFC 9669).
//!
//! What our programs need of it: 64-bit arithmetic, comparisons of 64 (`r1`) and 32 bits (`w1`), loads and stores, labels,
//! calls of the kernel's helpers by name, and maps (`r1 = map(NAME)`). A comment begins with `;`.

use std::collections::BTreeMap;

// Classes and modes of instructions (RFC 9669, section 3 to 5).
const LDX: u8 = 0x01;
const STX: u8 = 0x03;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const ALU64: u8 = 0x07;
const MEM: u8 = 0x60;
const FROM_REGISTER: u8 = 0x08;
const TO_BIG_ENDIAN: u8 = 0xdc;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// A load of 64 bits, which takes two instructions; from this register it is a map's descriptor.
const LOAD_WIDE: u8 = 0x18;
const MAP: u8 = 1;

const SIZES: [(&str, u8); 4] = [("u32", 0x00), ("u16", 0x08), ("u8", 0x10), ("u64", 0x18)];
/// Longer ones first: one may begin with another.
const ARITHMETIC: [(&str, u8); 10] = [
    (" <<= ", 0x60),
    (" >>= ", 0x70),
    (" += ", 0x00),
    (" -= ", 0x10),
    (" |= ", 0x40),
    (" &= ", 0x50),
    (" ^= ", 0xa0),
    (" *= ", 0x20),
    (" %= ", 0x90),
    (" = ", 0xb0),
];
const COMPARISONS: [(&str, u8); 6] =
    [(" == ", 0x10), (" != ", 0x50), (" >= ", 0x30), (" <= ", 0xb0), (" > ", 0x20), (" < ", 0xa0)];
/// Helpers by their number (`include/uapi/linux/bpf.h`).
const HELPERS: [(&str, i32); 8] = [
    ("map_lookup_elem", 1),
    ("ktime_get_ns", 5),
    ("redirect", 23),
    ("skb_load_bytes", 26),
    ("skb_pull_data", 39),
    ("skb_change_head", 43),
    ("fib_lookup", 69),
    ("redirect_neigh", 152),
];

/// An instruction whose jump may still be without its distance.
struct Instruction<'a> {
    code: u8,
    to: u8,
    from: u8,
    offset: i16,
    value: i32,
    jump: Option<&'a str>,
}

/// Makes a text into instructions. `index` says which index the device of a name has, or which descriptor the map.
pub(super) fn assemble(text: &str, mut index: impl FnMut(&str) -> Option<u32>) -> Result<Vec<u64>, String> {
    let mut labels = BTreeMap::new();
    let mut instructions = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.split(';').next().unwrap_or_default().trim();
        if let Some(label) = line.strip_suffix(':') {
            if labels.insert(label, instructions.len()).is_some() {
                return Err(format!("line {number}: label {label} is there twice"));
            }
        } else if !line.is_empty() {
            let read = instruction(line, &mut index);
            let read = read.ok_or_else(|| format!("line {number} is no instruction: {line}"))?;
            let rest = (read.code == LOAD_WIDE).then(|| plain(0));
            instructions.push(read);
            instructions.extend(rest);
        }
    }
    instructions
        .iter()
        .enumerate()
        .map(|(at, instruction)| {
            let offset = match instruction.jump {
                None => instruction.offset,
                Some(label) => {
                    let target = labels.get(label).ok_or_else(|| format!("there is no label {label}"))?;
                    let distance = target.cast_signed() - at.cast_signed() - 1;
                    i16::try_from(distance).map_err(|_| format!("label {label} is too far away"))?
                }
            };
            Ok(instruction.encode(offset))
        })
        .collect()
}

impl Instruction<'_> {
    /// `struct bpf_insn` in host order.
    fn encode(&self, offset: i16) -> u64 {
        let registers =
            if cfg!(target_endian = "big") { self.to << 4 | self.from } else { self.from << 4 | self.to };
        let [o0, o1] = offset.to_ne_bytes();
        let [v0, v1, v2, v3] = self.value.to_ne_bytes();
        u64::from_ne_bytes([self.code, registers, o0, o1, v0, v1, v2, v3])
    }
}

fn plain(code: u8) -> Instruction<'static> {
    Instruction { code, to: 0, from: 0, offset: 0, value: 0, jump: None }
}

fn instruction<'a>(line: &'a str, index: &mut impl FnMut(&str) -> Option<u32>) -> Option<Instruction<'a>> {
    if line == "exit" {
        return Some(plain(EXIT));
    }
    if let Some(name) = line.strip_prefix("call ") {
        let (_, value) = HELPERS.into_iter().find(|(helper, _)| *helper == name)?;
        return Some(Instruction { value, ..plain(CALL) });
    }
    if let Some(label) = line.strip_prefix("goto ") {
        return Some(Instruction { jump: Some(label), ..plain(JMP) });
    }
    if let Some(rest) = line.strip_prefix("if ") {
        let (condition, label) = rest.split_once(" goto ")?;
        let (left, operation, right) = split(condition, &COMPARISONS)?;
        let class = if left.starts_with('w') { JMP32 } else { JMP };
        let (source, from, value) = operand(right, class == JMP32, index)?;
        let to = register(left)?;
        return Some(Instruction { to, from, value, jump: Some(label), ..plain(class | operation | source) });
    }
    if line.starts_with('*') {
        let (target, from) = line.split_once(" = ")?;
        let (size, to, offset) = memory(target)?;
        return Some(Instruction { to, from: register(from)?, offset, ..plain(STX | MEM | size) });
    }
    let (left, operation, right) = split(line, &ARITHMETIC)?;
    let to = register(left)?;
    if right.starts_with('*') {
        let (size, from, offset) = memory(right)?;
        return (operation == 0xb0).then_some(Instruction { to, from, offset, ..plain(LDX | MEM | size) });
    }
    if let Some(name) = right.strip_prefix("map(").and_then(|rest| rest.strip_suffix(')')) {
        let value = i32::try_from(index(name)?).ok().filter(|_| operation == 0xb0)?;
        return Some(Instruction { to, from: MAP, value, ..plain(LOAD_WIDE) });
    }
    if let Some((bits, of)) = right.strip_prefix("be").and_then(|rest| rest.split_once(' ')) {
        let value = bits.parse().ok().filter(|bits| [16, 32, 64].contains(bits))?;
        return (operation == 0xb0 && register(of)? == to).then_some(Instruction {
            to,
            value,
            ..plain(TO_BIG_ENDIAN)
        });
    }
    let (source, from, value) = operand(right, operation == 0x50, index)?;
    Some(Instruction { to, from, value, ..plain(ALU64 | operation | source) })
}

fn split<'a>(text: &'a str, operators: &[(&str, u8)]) -> Option<(&'a str, u8, &'a str)> {
    operators.iter().find_map(|(operator, code)| {
        let (left, right) = text.split_once(operator)?;
        Some((left, *code, right))
    })
}

/// The mode, the register and the number of what stands on the right. A number becomes one of 64 bits with its sign: `wide`
/// says that one of 32 bits without a sign will do as well.
fn operand(text: &str, wide: bool, index: &mut impl FnMut(&str) -> Option<u32>) -> Option<(u8, u8, i32)> {
    if let Some(number) = register(text) {
        return Some((FROM_REGISTER, number, 0));
    }
    if let Some(name) = text.strip_prefix("index(").and_then(|rest| rest.strip_suffix(')')) {
        return Some((0, 0, i32::try_from(index(name)?).ok()?));
    }
    let number = match text.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16).ok()?,
        None => text.parse().ok()?,
    };
    let value = i32::try_from(number).ok();
    let value = value.or_else(|| u32::try_from(number).ok().filter(|_| wide).map(u32::cast_signed))?;
    Some((0, 0, value))
}

/// `r0` to `r10`, or its lower half.
fn register(text: &str) -> Option<u8> {
    let number = text.strip_prefix(['r', 'w'])?.parse().ok()?;
    (number <= 10).then_some(number)
}

/// Size, register and offset of `*(SIZE *)(REGISTER + OFFSET)`.
fn memory(text: &str) -> Option<(u8, u8, i16)> {
    let (size, place) = text.strip_prefix("*(")?.strip_suffix(')')?.split_once(" *)(")?;
    let (_, size) = SIZES.into_iter().find(|(name, _)| *name == size)?;
    let (base, sign, offset) = match place.split_once(" + ") {
        Some((base, offset)) => (base, 1, offset),
        None => place.split_once(" - ").map(|(base, offset)| (base, -1, offset))?,
    };
    Some((size, register(base)?, sign * offset.parse::<i16>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> Result<[u8; 8], String> {
        assemble(text, |name| (name == "br0").then_some(7)).map(|all| all[0].to_ne_bytes())
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn each_form_is_encoded_as_llvm_does() {
        // llvm-mc -triple bpfel -show-encoding
        for (text, bytes) in [
            ("r6 = r1", [0xbf, 0x16, 0, 0, 0, 0, 0, 0]),
            ("r2 = -64", [0xb7, 0x02, 0, 0, 0xc0, 0xff, 0xff, 0xff]),
            ("r2 += r3", [0x0f, 0x32, 0, 0, 0, 0, 0, 0]),
            ("r2 -= 14", [0x17, 0x02, 0, 0, 14, 0, 0, 0]),
            ("r2 &= 0xffff0000", [0x57, 0x02, 0, 0, 0, 0, 0xff, 0xff]),
            ("r9 >>= 2", [0x77, 0x09, 0, 0, 2, 0, 0, 0]),
            ("r2 = be16 r2", [0xdc, 0x02, 0, 0, 16, 0, 0, 0]),
            ("r2 = *(u8 *)(r7 + 9)", [0x71, 0x72, 9, 0, 0, 0, 0, 0]),
            ("r9 = *(u16 *)(r7 + 2)", [0x69, 0x79, 2, 0, 0, 0, 0, 0]),
            ("r2 = *(u32 *)(r10 - 56)", [0x61, 0xa2, 0xc8, 0xff, 0, 0, 0, 0]),
            ("*(u64 *)(r10 - 8) = r2", [0x7b, 0x2a, 0xf8, 0xff, 0, 0, 0, 0]),
            ("*(u16 *)(r7 + 10) = r2", [0x6b, 0x27, 10, 0, 0, 0, 0, 0]),
            ("r2 ^= r3", [0xaf, 0x32, 0, 0, 0, 0, 0, 0]),
            ("r2 *= 5", [0x27, 0x02, 0, 0, 5, 0, 0, 0]),
            ("r2 %= 3", [0x97, 0x02, 0, 0, 3, 0, 0, 0]),
            ("r1 = map(br0)", [0x18, 0x11, 0, 0, 7, 0, 0, 0]),
            ("r1 = index(br0)", [0xb7, 0x01, 0, 0, 7, 0, 0, 0]),
            ("call fib_lookup", [0x85, 0, 0, 0, 69, 0, 0, 0]),
            ("exit", [0x95, 0, 0, 0, 0, 0, 0, 0]),
            ("a:\ngoto a", [0x05, 0, 0xff, 0xff, 0, 0, 0, 0]),
            ("if r2 <= r8 goto a\na:\nexit", [0xbd, 0x82, 0, 0, 0, 0, 0, 0]),
            ("if r2 != 0x45 goto a\nexit ; passed over\na:\nexit", [0x55, 0x02, 1, 0, 0x45, 0, 0, 0]),
            ("if w2 != 3232235520 goto a\na:\nexit", [0x56, 0x02, 0, 0, 0, 0, 0xa8, 0xc0]),
        ] {
            assert_eq!(one(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_instruction_is_refused_with_its_line() {
        for wrong in [
            "r11 = 1",
            "r1 = 0x80000000",
            "if r2 != 3232235520 goto a\na:",
            "r1 = index(tun0)",
            "call something",
            "r1 /= r2",
            "r1 += map(br0)",
            "r1 = be16 r2",
            "r2 += *(u8 *)(r7 + 9)",
            "*(u24 *)(r7 + 9) = r1",
            "nonsense",
        ] {
            let said = one(wrong).unwrap_err();
            assert!(said.starts_with("line 1 is no instruction"), "{wrong}: {said}");
        }
        let wide = assemble("goto a\nr1 = map(br0)\na:\nexit", |_| Some(7)).unwrap();
        assert_eq!((wide.len(), wide[0]), (4, 0x02_0005), "a map takes two, and jumps count them");
        assert_eq!(one("goto a").unwrap_err(), "there is no label a");
        assert!(one("a:\na:\nexit").unwrap_err().contains("twice"));
    }
}
