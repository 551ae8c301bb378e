//! A list of allowed calls as a program of classic BPF: a table of bits.
//!
//! Each thread installs its own, in the path of a VM's start, and that takes the longer the longer the
//! program is, for the kernel checks and translates it each time. It also runs a program that only
//! compares once for every system call that there is, to remember what it need not ask again. So a search
//! by halves, of 208 operations, took 50 µs to install; this table, of 98, takes 31, for what it
//! computes the kernel does not try to foresee. The price is that it runs at each call, which takes 20 ns
//! (Linux 6.18).
//! Source: Linux Documentation/networking/filter.rst; kernel/seccomp.c, seccomp_check_filter.

use seccompiler::sock_filter;

/// Offsets in `struct seccomp_data`. Of an argument, the lower half.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Calls in a row of the table: a bit each.
const ROW: u32 = 32;

/// Operations.
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const LOAD_VALUE: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_IMM) as u16;
const TO_INDEX: u16 = (libc::BPF_MISC | libc::BPF_TAX) as u16;
const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
const SHIFT_RIGHT: u16 = (libc::BPF_ALU | libc::BPF_RSH | libc::BPF_X) as u16;
const GO_ON: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// What an argument of a call has to be: one of some values, in these bits.
#[derive(Clone, Debug)]
pub(super) struct Condition {
    pub(super) argument: u8,
    pub(super) mask: u32,
    pub(super) values: Vec<u32>,
}

/// A system call that is allowed, always or on a condition.
pub(super) type Allowed = (u32, Option<Condition>);

/// The program that allows these calls, and has all others fail with EPERM. The numbers of the x32
/// interface are behind the last row, since they have a bit set that no other has.
pub(super) fn compile(calls: &[Allowed]) -> Vec<sock_filter> {
    let mut program = vec![
        load(ARCH),
        // Calls by the interfaces for 32-bit programs have other numbers.
        jump(IF_EQUAL, AUDIT_ARCH_X86_64, 1, 0),
        refuse(),
        load(NUMBER),
    ];
    for (number, condition) in calls {
        let Some(condition) = condition else { continue };
        let check = check(condition);
        program.push(jump(IF_EQUAL, *number, 0, check.len() as u8));
        program.extend(check);
    }
    program.extend(look_up(&rows(calls)));
    program
}

/// The calls that are allowed always, as a table.
fn rows(calls: &[Allowed]) -> Vec<u32> {
    let mut rows = Vec::new();
    for (number, _) in calls.iter().filter(|(_, condition)| condition.is_none()) {
        let row = (number / ROW) as usize;
        if rows.len() <= row {
            rows.resize(row + 1, 0);
        }
        if let Some(bits) = rows.get_mut(row) {
            *bits |= 1 << (number % ROW);
        }
    }
    rows
}

/// Looks at the number's bit. What is behind the last row is refused.
fn look_up(rows: &[u32]) -> Vec<sock_filter> {
    let mut program = vec![operation(AND, ROW - 1), operation(TO_INDEX, 0), load(NUMBER)];
    for (row, bits) in (0..).zip(rows) {
        // Behind the other rows, of three operations each, and the refusal.
        let rest = (rows.len() as u32 - row - 1) * 3 + 1;
        program.extend([
            jump(IF_AT_LEAST, (row + 1) * ROW, 2, 0),
            operation(LOAD_VALUE, *bits),
            operation(GO_ON, rest),
        ]);
    }
    let bit = [operation(SHIFT_RIGHT, 0), jump(IF_ANY_BIT, 1, 1, 0), refuse(), allow()];
    program.push(refuse());
    program.extend(bit);
    program
}

/// Looks at an argument.
fn check(condition: &Condition) -> Vec<sock_filter> {
    let mut program = vec![load(ARGUMENTS + 8 * u32::from(condition.argument))];
    if condition.mask != u32::MAX {
        program.push(operation(AND, condition.mask));
    }
    let left = (1..=condition.values.len() as u8).rev();
    let asked = condition.values.iter().zip(left);
    program.extend(asked.map(|(value, left)| jump(IF_EQUAL, *value, left, 0)));
    program.extend([refuse(), allow()]);
    program
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: LOAD, jt: 0, jf: 0, k: offset }
}

fn operation(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn allow() -> sock_filter {
    sock_filter { code: RETURN, jt: 0, jf: 0, k: libc::SECCOMP_RET_ALLOW }
}

fn refuse() -> sock_filter {
    let k = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
    sock_filter { code: RETURN, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a program says of a call, and after how many operations.
    fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u32; 6]) -> (bool, usize) {
        let (mut at, mut value, mut index, mut steps) = (0, 0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            (at, steps) = (at + 1, steps + 1);
            match code {
                LOAD if k == NUMBER => value = number,
                LOAD if k == ARCH => value = arch,
                LOAD => value = arguments[(k - ARGUMENTS) as usize / 8],
                LOAD_VALUE => value = k,
                TO_INDEX => index = value,
                AND => value &= k,
                SHIFT_RIGHT => value >>= index,
                IF_EQUAL => at += usize::from(if value == k { jt } else { jf }),
                IF_AT_LEAST => at += usize::from(if value >= k { jt } else { jf }),
                IF_ANY_BIT => at += usize::from(if value & k != 0 { jt } else { jf }),
                GO_ON => at += k as usize,
                RETURN => return (k == libc::SECCOMP_RET_ALLOW, steps),
                other => panic!("an operation that is not run here: {other:#x}"),
            }
        }
    }

    #[test]
    fn each_number_is_found_and_no_other_in_a_few_steps() {
        for count in [0, 1, 2, 3, 7, 80, 400] {
            let calls: Vec<Allowed> = (0..count).map(|at| (at * 3 + 1, None)).collect();
            let program = compile(&calls);
            for number in 0..count * 3 + 5 {
                let (allowed, steps) = run(&program, AUDIT_ARCH_X86_64, number, [0; 6]);
                assert_eq!(allowed, number % 3 == 1 && number < count * 3, "{number} of {count}");
                // One for each row before its own.
                assert!(steps as u32 <= 12 + number / ROW, "{steps} for {number} of {count}");
                assert!(!run(&program, 0x4000_0003, number, [0; 6]).0, "a 32-bit call");
                assert!(!run(&program, AUDIT_ARCH_X86_64, number | 1 << 30, [0; 6]).0, "of x32");
            }
            assert!(!run(&program, AUDIT_ARCH_X86_64, u32::MAX, [0; 6]).0);
        }
    }

    #[test]
    fn an_argument_is_one_of_the_values_in_its_mask() {
        let condition = |argument, mask, values: &[u32]| {
            Some(Condition { argument, mask, values: values.to_vec() })
        };
        let program = compile(&[
            (9, condition(2, 4, &[0])),
            (16, condition(1, u32::MAX, &[0xae80, 7])),
            (17, None),
        ]);
        let allowed = |number, argument: usize, value| {
            let mut arguments = [0xffff_ffff; 6];
            arguments[argument] = value;
            run(&program, AUDIT_ARCH_X86_64, number, arguments).0
        };
        assert!(allowed(9, 2, 0xffff_fffb) && allowed(9, 2, 0) && !allowed(9, 2, 7));
        assert!(allowed(16, 1, 0xae80) && allowed(16, 1, 7) && !allowed(16, 1, 8));
        assert!(!allowed(16, 0, 7) && allowed(17, 0, 7) && !allowed(18, 0, 0));
    }
}
