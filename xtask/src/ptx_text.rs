//! PTX as text: taken apart into its items, launch directives hoisted from markers, and put
//! together again as modules that hold only what their entries reach.

use std::collections::{BTreeSet, HashMap};

use anyhow::{Context, Result, bail, ensure};

/// First line of every committed module.
const BANNER: &str = "// Built by `cargo xtask ptx` from kasmina-kernels/src. Do not edit.";

/// What begins a marker: a comment that a kernel's inline assembly emits, because rustc has no
/// attribute for the directive that follows it.
const MARKER: &str = "// kasmina: ";

/// Directives that a marker may name, in the order they stand between an entry's `)` and `{`.
const LAUNCH_DIRECTIVES: [&str; 3] = [".maxntid", ".minnctapersm", ".reqnctapercluster"];

/// The marker that raises the alignment of the entry's one parameter.
const PARAM_ALIGN: &str = ".param_align";

/// How LLVM begins the label of a block: the numbers of its function and of the block follow. It
/// is known inside its function only, so that it needs no number of that.
const BLOCK_LABEL: &str = "$L__BB";

/// Instructions of a later ISA version than the one rustc names, and that version.
const LATER_INSTRUCTIONS: [(&str, &str); 1] = [("st.async.", "8.1")];

/// A PTX file, taken apart.
#[derive(Debug)]
pub struct Ptx {
    /// The ISA version it is written in, `8.0` for instance.
    pub version: String,
    /// The architecture it is for, `sm_90a` for instance.
    pub target: String,
    items: Vec<Item>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Entry,
    Function,
    Variable,
}

/// A statement at file scope.
#[derive(Debug)]
struct Item {
    kind: Kind,
    name: String,
    text: String,
}

impl Ptx {
    /// Takes apart what rustc emitted and hoists the launch directives.
    ///
    /// # Errors
    /// A statement, a marker or a marker's place that is not understood.
    pub fn parse(text: &str) -> Result<Self> {
        let text = strip_noise(text);
        let mut version = None;
        let mut target = None;
        let mut items = Vec::new();
        let mut rest = text.as_str();
        while !rest.trim_start().is_empty() {
            rest = rest.trim_start();
            let line = rest.lines().next().unwrap_or_default();
            let directive = |name| line.strip_prefix(name).map(str::trim);
            if let Some(value) = directive(".version ") {
                version = Some(value.to_owned());
                rest = &rest[line.len()..];
            } else if let Some(value) = directive(".target ") {
                // `.target sm_90a, debug` in a build with debug information.
                target = value.split(',').next().map(str::to_owned);
                rest = &rest[line.len()..];
            } else if directive(".address_size ").is_some() {
                rest = &rest[line.len()..];
            } else {
                let statement;
                (statement, rest) = split_statement(rest)?;
                if !statement.starts_with(".section") {
                    items.push(Item::parse(statement)?);
                }
            }
        }
        Ok(Self {
            version: version.context("the PTX has no .version")?,
            target: target.context("the PTX has no .target")?,
            items,
        })
    }

    /// Names of the entries, in the order they stand.
    pub fn entries(&self) -> impl Iterator<Item = &str> {
        self.items.iter().filter(|item| item.kind == Kind::Entry).map(|item| item.name.as_str())
    }

    /// A module of these entries and of every function and variable they reach, nothing else.
    ///
    /// # Errors
    /// An entry that is not here.
    pub fn module(&self, entries: &[&str]) -> Result<String> {
        let mut by_name: HashMap<&str, Vec<&Item>> = HashMap::new();
        for item in &self.items {
            // A function that is declared before it is defined stands here twice.
            by_name.entry(&item.name).or_default().push(item);
        }
        let mut pending = Vec::new();
        for &entry in entries {
            ensure!(
                self.entries().any(|name| name == entry),
                "the kernel sources define no entry {entry}, which a `Module` lists"
            );
            pending.push(entry);
        }
        let mut reached = BTreeSet::new();
        while let Some(name) = pending.pop() {
            if reached.insert(name) {
                let text = by_name[name].iter().flat_map(|item| identifiers(&item.text));
                pending.extend(text.filter(|identifier| by_name.contains_key(identifier)));
            }
        }
        let items: Vec<&Item> =
            self.items.iter().filter(|item| reached.contains(item.name.as_str())).collect();
        let later = LATER_INSTRUCTIONS
            .into_iter()
            .filter(|(name, _)| items.iter().any(|item| item.text.contains(name)))
            .map(|(_, version)| version);
        let version = later.chain([self.version.as_str()]).max_by_key(|&version| {
            version.split('.').map(|part| part.parse().unwrap_or(0)).collect::<Vec<u32>>()
        });
        let header = [
            BANNER.to_owned(),
            format!(".version {}", version.unwrap_or_default()),
            format!(".target {}", self.target),
            ".address_size 64".to_owned(),
        ];
        let blocks: Vec<String> = [header.join("\n")]
            .into_iter()
            .chain(items.iter().map(|item| item.text.clone()))
            .collect();
        Ok(blocks.join("\n\n") + "\n")
    }
}

impl Item {
    fn parse(statement: &str) -> Result<Self> {
        let head = statement.split(['{', '=', ';']).next().unwrap_or_default();
        let (kind, name) = if let Some((_, signature)) = head.split_once(".entry") {
            (Kind::Entry, identifiers(signature).next())
        } else if let Some((_, signature)) = head.split_once(".func") {
            // `.func (.param .b32 result) name(…)`
            let signature = signature.trim_start();
            let after_result = match signature.strip_prefix('(') {
                Some(result) => result.split_once(')').map_or("", |(_, after)| after),
                None => signature,
            };
            (Kind::Function, identifiers(after_result).next())
        } else if [".global", ".const", ".shared"].iter().any(|space| head.contains(space)) {
            (Kind::Variable, identifiers(head.split('[').next().unwrap_or_default()).last())
        } else {
            bail!("cannot tell what this PTX statement is: {}", first_line(statement));
        };
        let name = name.with_context(|| format!("a nameless item: {}", first_line(statement)))?;
        let text = match kind {
            Kind::Entry => hoist_markers(name, statement)?,
            Kind::Function | Kind::Variable => {
                ensure!(
                    !statement.contains(MARKER),
                    "{name} holds a launch marker but is no entry: inline it into the kernel"
                );
                statement.to_owned()
            }
        };
        Ok(Self { kind, name: name.to_owned(), text })
    }
}

fn first_line(statement: &str) -> &str {
    statement.lines().next().unwrap_or_default()
}

/// Drops comments that are no markers, blank lines, references to source lines, and from labels
/// the number of their function, which changes whenever a kernel is added before it.
fn strip_noise(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    for line in text.lines() {
        let trimmed = line.trim_start();
        let line = if trimmed.starts_with(MARKER) {
            trimmed
        } else {
            line.split("//").next().unwrap_or_default()
        };
        let line = line.trim_end();
        if !line.is_empty() && !trimmed.starts_with(".loc") && !trimmed.starts_with(".file") {
            let mut pieces = line.split(BLOCK_LABEL);
            kept.push_str(pieces.next().unwrap_or_default());
            for piece in pieces {
                kept.push_str(BLOCK_LABEL);
                kept.push_str(piece.trim_start_matches(|c: char| c.is_ascii_digit()));
            }
            kept.push('\n');
        }
    }
    kept
}

/// The first statement, up to its `;` or, where it has a body, its closing brace; and the rest.
fn split_statement(text: &str) -> Result<(&str, &str)> {
    let mut depth = 0usize;
    let mut in_comment = false;
    // `.global .b8 table[2] = {1, 2};` ends at the semicolon, not at the brace.
    let mut initialiser = false;
    for (position, byte) in text.bytes().enumerate() {
        match byte {
            b'\n' => in_comment = false,
            _ if in_comment => {}
            b'/' if text[position..].starts_with("//") => in_comment = true,
            b'=' if depth == 0 => initialiser = true,
            b'{' => depth += 1,
            b'}' => {
                depth = depth
                    .checked_sub(1)
                    .with_context(|| format!("unbalanced braces in {}", first_line(text)))?;
                if depth == 0 && !initialiser {
                    return Ok(text.split_at(position + 1));
                }
            }
            b';' if depth == 0 => return Ok(text.split_at(position + 1)),
            _ => {}
        }
    }
    bail!("an unfinished PTX statement: {}", first_line(text))
}

/// The words of a PTX text that can be names.
fn identifiers(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| {
        !(c.is_ascii_alphanumeric() || c == '_' || c == '$' || c == '%' || c == '.')
    })
    .flat_map(|word| word.split('.').skip(usize::from(word.starts_with('.'))))
    .filter(|word| word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_' || c == '$'))
}

/// Takes the markers out of an entry's body and writes what they ask for into its head.
fn hoist_markers(entry: &str, statement: &str) -> Result<String> {
    let (markers, lines): (Vec<&str>, Vec<&str>) =
        statement.lines().partition(|line| line.starts_with(MARKER));
    let mut directives: HashMap<&str, &str> = HashMap::new();
    for marker in markers {
        let marker = marker.trim_start_matches(MARKER).trim();
        let (name, value) = marker.split_once(' ').unwrap_or((marker, ""));
        ensure!(
            name == PARAM_ALIGN || LAUNCH_DIRECTIVES.contains(&name),
            "{entry}: unknown marker `{marker}`; known are {PARAM_ALIGN} and {}",
            LAUNCH_DIRECTIVES.join(", ")
        );
        let well_formed = value.split(',').all(|number| number.trim().parse::<u32>().is_ok());
        ensure!(well_formed, "{entry}: the marker `{marker}` wants numbers");
        // Inlining may have copied the assembly that holds the marker.
        let earlier = directives.insert(name, value);
        ensure!(
            earlier.is_none_or(|earlier| earlier == value),
            "{entry}: two markers disagree about {name}"
        );
    }
    let mut text = lines.join("\n");
    if let Some(align) = directives.get(PARAM_ALIGN) {
        text = raise_param_alignment(entry, &text, align)?;
    }
    let body = text.find('{').with_context(|| format!("the entry {entry} has no body"))?;
    let launch: String = LAUNCH_DIRECTIVES
        .iter()
        .filter_map(|name| Some(format!("{name} {}\n", directives.get(name)?)))
        .collect();
    text.insert_str(body, &launch);
    Ok(text)
}

/// `.param .align 8 .b8 entry_param_0[…]` with `align` instead of what rustc wrote, which is 16 at
/// most.
fn raise_param_alignment(entry: &str, text: &str, align: &str) -> Result<String> {
    let parameter = format!(" .b8 {entry}_param_0[");
    let before = ".param .align ";
    let (head, tail) = text
        .split_once(&parameter)
        .with_context(|| format!("{entry}: {PARAM_ALIGN} needs one parameter passed by value"))?;
    let (start, rustc_align) = head
        .rsplit_once(before)
        .with_context(|| format!("{entry}: its parameter has no alignment to raise"))?;
    let (old, new) = (rustc_align.trim().parse::<u32>()?, align.parse::<u32>()?);
    ensure!(
        new.is_power_of_two() && new >= old,
        "{entry}: {PARAM_ALIGN} {new} is no power of two that is at least rustc's {old}"
    );
    Ok(format!("{start}{before}{align}{parameter}{tail}"))
}

#[cfg(test)]
mod tests;
